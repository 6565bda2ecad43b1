"""Write adapter files: one writer, one size, and the configuration of PEFT."""
