"""Which adapters exist: `AdapterSpec` <-> PEFT's config."""
