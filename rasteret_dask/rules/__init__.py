"""What a pixel means, as values with methods: kinds of band."""
