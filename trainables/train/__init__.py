"""Training of one recipe: the loop and what it is made of; knows neither Ray nor MLflow."""
