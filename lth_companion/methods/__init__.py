"Where masks come from: before, during and instead of training."
