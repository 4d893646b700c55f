"""Which channel counts of a decoder scale together, and which widths to choose; imports what branch may."""
