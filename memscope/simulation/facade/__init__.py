"""The GPU as the code under simulation sees it."""
