"""How a Petals server will turn out, worked out before it is started."""
