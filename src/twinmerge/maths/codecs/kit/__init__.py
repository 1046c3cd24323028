"""What codecs are written with: the base class, exact scales, and what is asked of one that is not ours."""
