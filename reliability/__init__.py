"""What the promises were tried with: chaos, fuzz, soak, mutants; figures are in docs/reliability.md."""
