"""Pictures, sounds and videos in prompts and steps."""
