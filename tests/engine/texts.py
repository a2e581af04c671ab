"""A text for the real checkpoint, of more than 700 of its tokens."""

STORY = """The lighthouse at Gull Point had been dark for eleven years when Marta bought it. The \
agent from the harbour office, a thin man with a cold, warned her that the roof leaked, that the \
stairs were not safe above the second landing, and that in winter the road could be under water \
for days. She signed the papers on the bonnet of his car. He asked twice what she wanted it for, \
and both times she told him that she wished to hear the sea without people in front of it.

She moved in on the first of March with four boxes of books, a telescope, a stove and a grey dog \
called Admiral. The kitchen window faced east. Every morning the fishing boats left the harbour \
in a line, seven of them at the beginning of spring and five at the end of it, and she wrote down \
the time at which each of them passed the red buoy. She could not have said why. Her father had \
kept such lists: trains, the depth of the well, the prices of copper and tin. After his funeral \
she had found forty notebooks in his desk, each with a year on its cover, and not one sentence in \
any of them about himself.

In April she repaired the stairs. The carpenter in the village sold her oak that had been meant \
for a boat and taught her how to cut a joint which holds without glue. "Wood moves," he said. "If \
you do not let it move, it will break the thing that stops it." She thought about this for a long \
time afterwards. On the third landing, behind a panel that came loose in her hands, she found the \
log of the last keeper. It began in 1931. The entries were short: wind, visibility, oil used, \
ships seen. But on the inside of the back cover, in a different ink, somebody had written a list \
of names, and beside every name a date, and beside every date a small drawing of a lamp.

She carried the book to the harbour office. The thin man turned the pages slowly, and for once he \
did not cough. The names, he told her, were those of people who had come ashore alive. There were \
sixty-two of them. The last was a boy called Peter Lund, on the ninth of November 1968, and when \
he read that line he put the book down on the counter and looked out of the window for a while. \
"I was nine years old," he said. "I remember the light. I remember that it went out and came back \
again, and that every time it came back I was a little nearer to the rocks, and a little more \
certain that someone knew where I was."

That summer they worked on the lamp together. The lens had lost two of its prisms, but the glass \
works in the city still owned the drawings, and for a price that made her laugh out loud they \
offered to grind new ones. She sold the telescope. He brought his nephew, who knew about motors, \
and a retired teacher of physics who knew about everything and was glad to be asked. By the end \
of September the mechanism turned. On the ninth of November, a little after five in the evening, \
with half of the village standing in the rain at the foot of the tower, Marta climbed the oak \
stairs, and the dog climbed after her, and she closed the switch. The beam went out over the \
water, touched the red buoy, and moved on. Far away, where the sea and the sky could no longer be \
told apart, a ship that she had not known was there answered with three long blasts of its horn.
"""
