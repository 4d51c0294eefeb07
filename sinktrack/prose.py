"""A little prose, for a probe where nobody gave one."""

SENTENCES = (
    "The harbour was quiet at dawn, and only the gulls seemed to know that a ship had come in.",
    "Nobody on the quay could say where it had loaded, or why its lamps were still burning.",
    "Every spring the river carries a little more sand past the bridge than the year before.",
    "Engineers measured the drift with painted stones, which they counted again after each flood.",
    "A good loaf needs patience: flour, water, salt, and a warm corner of the kitchen overnight.",
    "When the crust sings as it cools, the baker knows that the oven was hot enough.",
    "Seven of the eleven samples dissolved within an hour; the other four took until morning.",
    "We repeated the experiment twice, with fresh acid, and found the same difference each time.",
    "Her grandmother kept the letters in a tin box, sorted by the colour of their stamps.",
    "Most were about the weather, yet between the lines you could follow an entire war.",
    "To sort a list, split it in two, sort both halves, and merge them while comparing heads.",
    "This takes a number of steps proportional to the length times its logarithm.",
    "In the high valleys, the shepherds whistle to each other across a mile of empty air.",
    "Children learn the whistled words before they can write, and never quite forget them.",
    "Light from that galaxy set out before there were flowers, or birds, or any grass at all.",
    "What we photograph tonight is therefore a letter from somebody who has long since moved.",
    "The committee adjourned at noon without a vote, having agreed only on the date of lunch.",
    "Minutes of the meeting will be circulated once the secretary has recovered her pen.",
    "Under pressure the metal bends first, then hardens, and finally breaks without warning.",
    "Small cracks grow along the grain, so inspectors look at the joints before anything else.",
    "If it rains on Thursday, the market moves under the arches beside the old post office.",
    "Fishmongers get the coldest end, flower sellers the windows, and musicians the stairs.",
    "Because prices fell faster than wages, many families bought their first bicycle that year.",
    "Roads were widened, maps were printed, and suddenly the next town was not so far away.",
)


def passages() -> list[str]:
    """The whole text once from the start of each sentence, wrapping around."""
    return [" ".join(SENTENCES[start:] + SENTENCES[:start]) for start in range(len(SENTENCES))]
