"""Model families: which modules exist and what each naming calls them. One file each, attribute `FAMILY`."""
