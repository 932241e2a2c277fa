"""Why a network says what it says, and what its training data have to do with it."""
