"""Write adapter files: the one writer, the one size, and the configuration that PEFT reads."""
