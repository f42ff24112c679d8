"""HTTP/1.1 as a load generator needs it: nothing on the way but what has to be timed."""
