"""What a trained model is worth: scores with their intervals, answers beside answers, another model's opinion."""
