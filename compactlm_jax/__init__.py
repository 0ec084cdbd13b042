"""Train, distil and compress BERT-like encoders on TPUs."""
