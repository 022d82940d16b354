"""Order and policy: Prefect flows over the steps of `moa`. No ML in here."""
