"""The VQ tokenizer of LlamaGen: model, quantizer, training losses and discriminators."""
