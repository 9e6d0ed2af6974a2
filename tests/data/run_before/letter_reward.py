"""The reward of the stored runs. Its text is part of what identifies their rewards: any edit makes them another reward's."""


def share(prompt: str, response: str) -> float:
    return response.count("a") / max(1, len(response))
