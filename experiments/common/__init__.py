"""Files, errors, command lines, text, memory: knows nothing of learning."""
