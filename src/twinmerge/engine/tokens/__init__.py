"""One vocabulary for models of several: which tokens the output has, and what each model's rows of them are."""
