"""The page of `inspect --html`, and the colours and spectra that it shares with pictures."""
