"""Text and sound from a trained model: `sample`, on top of engines that make one id at a time."""
