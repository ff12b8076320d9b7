"""Examples and corpora: reading, checking and splitting them."""
