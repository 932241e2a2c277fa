"""The pieces of which the report is made, and the two forms in which it is written."""
