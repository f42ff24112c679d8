"""Tables as text: in a terminal, in Markdown, as CSV and as JSON."""
