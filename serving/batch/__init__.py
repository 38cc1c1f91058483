"""Labels of very many posts: resumable, with its own engine in process or many on Ray."""
