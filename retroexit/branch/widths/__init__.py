"""Which channel counts scale together, and which widths to choose. Imports what `retroexit.branch` may."""
