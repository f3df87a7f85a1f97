"""Other people's programs: start them, watch them train, and stop them."""
