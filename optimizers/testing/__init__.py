"""Problems, checks and training tasks with which to test any torch optimizer."""
