"""From a task and its data to trained variables: steps, epochs, checkpoints, devices."""
