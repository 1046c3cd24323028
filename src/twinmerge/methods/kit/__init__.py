"""What the methods are written with: their base class, how they are found by name, and what several of them share."""
