"""Let ``python -m retroexit`` do what ``retroexit`` does."""

from retroexit.cli import main

main()
