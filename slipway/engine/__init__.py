"""From requests to tokens: schedule, batch, step, sample; knows no text but through the codec, and no HTTP."""
