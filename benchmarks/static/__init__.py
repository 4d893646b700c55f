"""Parts of `against_static.py`: early exits beside networks that were compressed once and for all."""
