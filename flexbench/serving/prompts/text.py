"""The text that prompts are taken from unless the person gives another one. ASCII only."""

from __future__ import annotations

BUILT_IN_TEXT = """\
The ferry leaves the island at six in the morning, when the market on the other shore is still \
being put up. Fishermen carry crates of ice down the ramp, a teacher marks papers on her knees, \
and two brothers argue about which of them forgot the bicycle pump. Nobody pays attention to the \
engine until it changes its note. Then every head turns, because the sound tells how strong the \
current is today and whether the boat will be late.

Some years ago the council asked an engineer to find out why the crossing took so long in \
autumn. She did not begin with the engine. She stood on the pier with a notebook and wrote down \
when each passenger arrived, when each one stepped on board, and when the ropes were cast off. \
After nine days she had her answer: the boat was quick enough, but people waited for the only \
ticket window, and the captain waited for the people. A second window was cheaper than a second \
engine, and the crossing became eleven minutes shorter without a single turn of the propeller \
being any faster.

Her report became a small legend in the harbour office, and new clerks are still asked to read \
it. It says that a queue is a kind of memory, since it holds everything that came faster than it \
could be served. It says that an average hides the person who waited longest. It also says, in \
pencil and between the lines, that whoever measures a thing should first make sure that the \
measuring does not stand in its way. On the third day she had blocked the gangway with her own \
chair.

In winter the island belongs to the birds. Geese settle on the fields behind the lighthouse, and \
the keeper counts them from the gallery with a clicker in each hand, one for those that land and \
one for those that leave. He has learned to distrust round numbers. When the wind is from the \
north he counts twice, and when the two results differ he writes both into the book and draws a \
line under neither. Visitors sometimes ask him what the numbers are good for. He answers that he \
does not know yet, and that this is the reason to write them down carefully.

The bakery opens before the ferry returns. Its oven is old and has one good corner, so the \
loaves are moved around during the hour, each of them spending a while in the best place. The \
baker calls this fairness; her apprentice calls it scheduling. They have tried to bake more \
loaves at once, and up to twenty it works well. With thirty the oven cools down, every loaf \
takes longer, and fewer of them are ready by noon than on an ordinary day. A chalk mark on the \
wall shows where to stop, and next to it someone has drawn a curve that climbs, bends and lies \
down flat.

Towards evening the light on the water turns green, then copper, then grey. Children collect \
flat stones and let them skip across the bay: four times, five times, once even nine, although \
there were no witnesses. The last boat brings the mail, a spare part for the radio and the uncle \
of somebody. Its lamp swings as it comes round the rocks. Seen from the hill, the lights of both \
shores seem to lean towards each other, and for a moment it is hard to tell which of them are \
moving and which of them have always been there.
"""
