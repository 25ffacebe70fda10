"""What calls cost on a rented machine."""

SECONDS_PER_HOUR = 3600


def usd_per_million_tokens(usd_per_hour: float, tokens_per_s: float, utilisation: float) -> float:
    """Price of a million generated tokens on one rented machine.

    usd_per_hour is the machine's price, idle time included; utilisation is the share of the hour
    spent generating, in (0, 1]; tokens_per_s is over all concurrent requests.

    Raises ValueError for a speed or utilisation that is not positive, which would come out as
    free or as infinity.
    """
    if tokens_per_s <= 0 or not 0 < utilisation <= 1:
        raise ValueError(f"no price for {tokens_per_s=}, {utilisation=}")
    return usd_per_hour / (tokens_per_s * utilisation * SECONDS_PER_HOUR) * 1e6
