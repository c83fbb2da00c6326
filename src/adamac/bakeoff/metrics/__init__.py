"""What a video and a plan are judged by, without any downloaded weights."""
