"""Why a network says what it says: attribution, features, importance, doubtful labels."""
