"""Ways to look at what a compile did: an artifact explained, two compared, a program drawn. They change nothing."""
