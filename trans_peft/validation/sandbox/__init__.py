"""Run and check code that a model wrote, where it can harm nobody and vouch for nothing itself."""
