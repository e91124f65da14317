"""The type checker behind jaxtyping in tests: where a float is asked for an int will do, as everywhere in Python."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
