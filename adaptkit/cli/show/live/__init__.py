"""What is shown while a command works: its stages on stderr, and its log in a file."""
