"""The checker of annotations in tests: an int will do where a float is expected, as in Python."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
