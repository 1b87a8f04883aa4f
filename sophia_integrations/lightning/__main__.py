"""`python -m sophia_integrations.lightning fit --config FILE`: LightningCLI that knows Sophia by name."""

from .cli import main

if __name__ == "__main__":
    main()
