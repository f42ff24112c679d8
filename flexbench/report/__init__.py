"""From results files to an answer: read, aggregate, show."""
