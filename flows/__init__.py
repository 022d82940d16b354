"""The Prefect flows over `moa`, their order and policy, and the services of `moa up`. No ML in here."""
