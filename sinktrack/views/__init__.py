"""Where records are looked at without an account: terminal, figures, report, export."""
