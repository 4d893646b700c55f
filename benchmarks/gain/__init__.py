"""What guidance buys: cases, training of variants, tables and figures."""
