"""Every file here is a codec, by the name that is on the disk; `maths/codec.py` says what a codec is and finds them."""
