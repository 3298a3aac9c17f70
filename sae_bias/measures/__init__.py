"""What an intervention did: fidelity, costs, collapse, specificity, texts, identity, scenarios, judges."""
