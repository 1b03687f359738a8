"""A small made-up world that writes short English stories, so that a first model can be trained without any network.

Why invent text when the world is full of it? Three reasons.

1. *The same bytes everywhere.* Story number i is a pure function of (seed, i), on every machine and Python version.
   So a loss printed in the README can be compared with yours, and nothing needs to be downloaded or licensed.
2. *A small model can learn it.* Eldan & Li, "TinyStories" (2023, arXiv 2305.07759), showed that models of a few million
   parameters write fluent English when the training text keeps to a child's vocabulary. They let a large model write
   the stories; here a grammar does. A cast is drawn (who, where, what, which weather), then one of the plots below is
   told with it. Each step has several wordings and many steps are optional, so stories do not repeat.
3. *Answers can be checked.* The grammar knows what it said. Every `Story` carries its facts, each with a question that
   has exactly one right answer. Later stages use them: conversations, rewards, and preferences (a wrong answer is the
   answer to the same kind of fact in another story).

**Train and held out.** One in five names, towns, objects, foods and sums is held out: `split="train"` never draws
these, `split="test"` draws nothing else. A model that answers questions about test stories has learned to read, not to
remember. Pretraining text, its lessons included, draws on all (`split="all"`), so that the words are known.

**What to expect.** A model of 1 to 2 million parameters learns spelling, grammar and dialogue in a few minutes, then
to keep names and objects straight. It knows nothing beyond this world, and no plots but these. The wording is drawn at
random, so the loss has a floor well above zero, however large the model.

How to read the templates: `[a|b|c]` is one of a, b, c; `{x}` is a slot of the cast or a rule of RULES; `{X}` the same
with a capital; `{+x}` writes nothing and notes that fact x of FACTS has just been told.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

# ---- The words. Lists split at spaces, or at commas where entries have several words. Every fifth entry of HELD_OUT's
# lists belongs to the test split. Tables have a row a line and columns split at ";", alternatives in a column at "|".

GIRLS = """Anna Mila Zara Priya Lucy Nora Amara Elsa Freya Maya Ines Tara Leila Sofia Yuki Greta Hana Clara Ruth Dina
Abena Molly Petra Rosa Nadia Alice Wanda Lena Kira Thea Maribel Jana Aisha Olga Bianca Edith Fatima Gwen Heidi Irma
Judith Katya Linnea Marta Noemi Paula Ramona Selma Tilda Ursula Vera Willa Xenia Yasmin Zelda Astrid Brenda Celia Daphne
Esther Flora Gemma Helga Ilse Jenna Kamala Lydia Miriam Nina Odette Pilar Renata Sunita Tamsin Una Violeta""".split()
BOYS = """Omar Ben Leo Tom Kofi Sam Hugo Ravi Jonas Felix Mateo Noah Idris Emil Oskar Theo Luca Anton Pedro Samir Walter
Arthur Bruno Carlos Dimitri Edgar Finn Gustav Hassan Ivan Jasper Kenji Lars Milo Nils Oliver Pavel Quentin Rufus Stefan
Tariq Umberto Viktor Wesley Yusuf Zachary Abel Boris Cedric Diego Elias Fabian George Henry Ibrahim Joseph Kaspar Lionel
Marek Nathan Otto Philip Rashid Simon Tobias Ulrich Vincent Wilfred Yannick Zoltan Albert Basil Conrad Dexter""".split()
SURNAMES = """Bell Marsh Okoro Larsen Finch Patel Quill Novak Hobbs Tanaka Pryce Moreno Lund Barlow Keita Winslow Adler
Silva Crane Dubois Fenn Garrick Haddad Ito Jessup Kowal Lindqvist Mundy Nyman Ortega Pettigrew Rossi Sharma Thorne
Underhill Vance Whitlock Yates Zeller Abbott Bramble Chowdhury Dunmore Eriksen Farrow""".split()
PET_NAMES = """Biscuit Pepper Clover Button Sesame Waffle Domino Nutmeg Bramwell Pickle Socks Tulip Ginger Marble
Mittens Pudding Rascal Shadow Snowball Tango Velvet Whiskers Ziggy Acorn Bandit Cocoa Dumpling Fidget Gizmo Honeybee
Inky Jellybean Kipper Lollipop Mango Noodle Oatmeal Patches Quackers Rocket Scout Toffee Umber Truffle
Wiggles""".split()
TOWNS = """Willowbrook Ashford Pebbleton Larkhill Mossley Fernbridge Saltmouth Thornfield Applecross Millhaven Otterbank
Brightwater Coldspring Deepdale Elmstead Foxcombe Gullhaven Highmoor Ivybridge Juniper Kestrelton Lowmeadow Maplewick
Northgate Oakhollow Pinecliff Quarrytown Ravenport Stonebury Tidewell Underwood Vinefield Westerly Yewdale
Amberley""".split()
AGES = "five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "April May June July August September October".split()
COLOURS = """red blue green yellow purple orange pink white black brown grey turquoise scarlet crimson violet lilac
maroon cream emerald indigo ivory peach""".split()
TRAITS = """curious patient shy cheerful stubborn quiet thoughtful lively clever dreamy careful bold gentle restless
merry sensible talkative brave messy polite serious adventurous playful kind imaginative tidy forgetful hopeful punctual
sunny dutiful daring witty modest generous observant impatient fearless musical inventive""".split()
KIN = "grandmother grandfather aunt uncle godmother godfather great-aunt great-uncle stepmother stepfather".split()
FOODS = """plum cake, pea soup, pancakes, honey bread, cherry pie, roast chestnuts, potato stew, cheese toast, oatmeal
biscuits, rice pudding, lentil soup, baked apples, cinnamon buns, noodles, fruit salad, dumplings, corn bread, mushroom
pie, tomato soup, waffles, ginger cake, raisin buns, lemon tart, carrot cake, fried rice, jam rolls, almond cookies,
fish pie, omelette, blackberry jelly, spinach pasties, pumpkin soup, walnut loaf, peach cobbler, custard, vegetable
curry, sesame crackers, apricot jelly, mashed turnips, onion tart, hazelnut cake, buttered crumpets, mango sherbet,
stuffed peppers, leek quiche, mackerel sandwiches, coconut macaroons, gooseberry crumble, couscous, beetroot salad,
cauliflower cheese, strawberry trifle, banana fritters, pickled cucumbers, spaghetti, scrambled tofu, barley broth,
chocolate pudding, poppy seed rolls, sweet potatoes, bean stew"""
# Things that are counted.
ITEMS = """apples buttons shells acorns pears marbles feathers pebbles eggs plums stamps ribbons walnuts coins tulips
lemons pine-cones candles daisies carrots onions postcards beads cherries pumpkins stickers tomatoes chestnuts turnips
oranges peaches seeds bottles corks potatoes radishes melons daffodils mushrooms figs thimbles hazelnuts limes snowdrops
tickets corkscrews dice apricots cabbages dominoes""".split()
HOBBIES = """draw maps, collect stamps, sing in the bath, count the stars, read about pirates, climb trees, paint tiny
pictures, tell jokes, ask questions, invent games, hum old tunes, press flowers, watch clouds, write letters, study
beetles, dance in the kitchen, solve riddles, fold paper birds, listen to the radio, make puppets, feed the sparrows,
polish stones, jump over puddles, cook with spices, imitate birds, sort coins, play chess, look through telescopes, plan
voyages, knock on drums, walk barefoot, grow beans, take clocks apart, learn long words, sketch horses, roll down hills,
compose limericks, whittle sticks, memorise capitals, decorate envelopes, repair umbrellas, train snails, collect
keyholes, photograph doors, mix perfumes, practise handstands, imagine planets, pretend to be invisible, trace leaves,
rearrange furniture, tinker with radios, weave baskets, sort pebbles by size, design flags, rhyme silly words, explore
puddles"""
JOBS = """baker miller tailor carpenter potter librarian gardener fisherman postman shepherd doctor blacksmith painter
musician teacher sailor beekeeper cobbler clockmaker florist grocer weaver plumber vet farmer nurse driver cook
photographer astronomer mechanic glassblower barber printer ferryman lighthouse-keeper bookseller butcher dentist
goldsmith plasterer tinsmith optician chemist translator cartwright bellringer upholsterer surveyor stonemason
candlemaker bricklayer engraver cartographer locksmith""".split()
# What a thing is made of; how it breaks; how it is mended; the things.
THINGS = """
pine, oak, cedar; cracked down the middle; glue and a clamp; flute top boat box sword whistle train puppet stool rattle
wool, felt; came apart at the seam; a needle and some yarn; scarf mitten hat blanket sweater shawl cap slipper vest
paper, silk; tore along one side; thin tape and a steady hand; kite lantern crown fan pinwheel streamer parasol banner
tin, brass, copper; bent out of shape; a small hammer; bell compass trumpet medal cup key lamp badge horn kettle
clay, glass; chipped at the edge; strong glue; jug bead vase bowl plate saucer jar teapot pitcher inkwell
leather, canvas; split open; wax thread and a thick needle; ball glove bag belt satchel boot wallet saddle pouch purse
cotton, linen, velvet; ripped in two places; a neat row of stitches; doll flag apron pillow cape bonnet sash scrunchie
"""
# A pet, its voice, what it does when it is glad, what it likes.
PETS = """
dog; barked; wagged its tail; sticks        | cat; meowed; purred like an engine; warm windowsills
rabbit; thumped; hopped in circles; parsley | puppy; yapped; rolled on its back; old slippers
parrot; squawked; flapped its wings; nuts   | goat; bleated; kicked up its heels; thistles
duck; quacked; splashed about; puddles      | hen; clucked; fluffed up its feathers; barley
lamb; bleated; skipped sideways; clover     | hamster; squeaked; ran round its wheel; sunflower hearts
kitten; mewed; chased its own tail; balls of yarn | goose; honked; stretched its neck; wet grass
piglet; squealed; wriggled its curly tail; acorn mash | mouse; squeaked; twitched its whiskers; crumbs
"""
# A wild animal, where it lives, what it eats.
ANIMALS = """
hedgehog; under the hedge; beetles   | squirrel; in the old oak; nuts    | owl; in the barn; nothing but mice
fox; beyond the orchard; wild berries| dormouse; among the birches; berries | robin; in the ivy; worms
frog; beside the pond; flies         | duckling; by the river; water weeds   | badger; under the bank; roots
otter; by the stream; small fish     | crow; in the tall pine; scraps    | hare; in the long grass; clover
kingfisher; at the water's edge; minnows  | bat; under the roof; moths        | toad; beneath a stone; slugs
mole; under the lawn; earthworms     | seagull; on the cliff; shrimps    | turtle; in the marsh; lettuce
woodpecker; in the hollow elm; grubs | weasel; in the stone wall; eggs   | swallow; under the eaves; gnats
"""
# How a day can be, and what one sees of it.
WEATHERS = """
sunny; The roofs shone in the light.|The sun lay warm on every wall.
windy; Leaves whirled along the road.|Hats flew down the street.
cloudy; The sky looked like a flock of geese.|No shadows fell anywhere.
misty; The hills had vanished.|Even the church tower was hidden.
breezy; Washing danced on the lines.|Flags fluttered on the rooftops.
chilly; Breath hung in the air like smoke.|Everyone wore thick socks.
mild; The air smelled of grass.|Windows stood open everywhere.
warm; Dogs slept in the shade.|Every doorstep had someone sitting on it.
bright; The windows glittered.|Every puddle held a piece of sky.
dry; Dust rose behind every cart.|The grass crackled underfoot.
gusty; Doors banged up and down the road.|The treetops tossed.
crisp; Dew sparkled on the cobwebs.|Each sound carried a long way.
"""
# A place (with its preposition); a hiding spot there; what one sees; what one does there.
PLACES = """
at lake; behind the boathouse; ducks|reeds|ripples; skip stones|look for frogs
in forest; under a fallen log; ferns|tall beeches|toadstools; gather moss|follow the old trail
at market; beneath a fruit stall; bright awnings|baskets of spices; look at the stalls|bargain with the traders
on beach; between two rocks; waves|gulls|fishing boats; build sandcastles|wade in the foam
in park; behind the bandstand; fountain|swings|flower beds; ride the swings|sit by the fountain
at harbour; inside a coil of rope; masts|tugboats|crates; wave to the sailors|count the ships
in library; behind the atlases; shelves|reading lamps; read about dragons|turn the great globe
at farm; in the hayloft; cows|tractor|haystacks; help with the milking|pat the calves
on hill; in the long heather; valley|sheep|stone cairn; look at the view|race to the top
at mill; beside the water wheel; millstream|sacks of flour; watch the wheel turn|listen to the water
in orchard; in the fork of a tree; blossoms|ladders|wheelbarrows; climb the ladders|rest in the shade
at station; under a bench; engines|signals|travellers; watch the trains|guess where people were going
in museum; behind a suit of armour; mummies|fossils|paintings; see the dinosaur bones|draw the statues
in greenhouse; among the flowerpots; vines|orchids|cactuses; water the seedlings|smell the jasmine
at castle; at the foot of the tower; battlements|banners|drawbridge; explore the dungeon|play knights
on bridge; beside the railing; river|barges|lamp posts; drop twigs in the current|watch the barges
in meadow; beneath a thistle; butterflies|poppies|crickets; chase butterflies|lie in the grass
at bakery; behind the bread basket; loaves|pastries|ovens; smell the fresh bread|watch the kneading
in cave; on a narrow ledge; drips|crystals|echoes; shout for the echo|look at the crystals
at zoo; next to the monkey house; giraffes|penguins|zebras; visit the elephants|copy the monkeys
at playground; below the slide; seesaw|climbing frame|sandpit; swing high|slide down headfirst
in old house; inside an old trunk; cobwebs|rafters|dusty mirrors; try on old coats|search the trunks
at school; behind the piano; desks|chalkboard|coat hooks; practise spelling|feed the class goldfish
at lighthouse; on the spiral stairs; great lamp|cliffs|breakers; climb the stairs|spot distant ships
in garden; under the rhubarb; roses|bees|cabbages; pull up weeds|pick sweet peas
at theatre; behind the stage curtain; stage|costumes|spotlights; watch a rehearsal|practise bowing
at fair; beside the merry-go-round; striped tents|jugglers|lights; ride the big wheel|throw hoops
in canyon; in a crack in the rock; cliffs|eagles|boulders; search for fossils|call across the gap
by river; under a willow root; trout|dragonflies|current; fish with a bent pin|float bark boats
in barn; behind the hay bales; rafters|swallows|pitchforks; jump in the hay|hunt for eggs
at workshop; under the workbench; shavings|chisels|vices; sort the nails|plane a plank
in village square; at the foot of the statue; pigeons|clock|benches; feed the pigeons|play hopscotch
at airfield; next to the hangar; propellers|runway|pilots; watch the gliders|talk to the pilots
on island; in a hollow stump; palms|crabs|lagoon; dig for treasure|gather driftwood
at pond; among the water lilies; tadpoles|newts|lilies; catch tadpoles|watch the newts
in vineyard; between the rows of vines; grapes|hillsides|barrels; pick grapes|carry baskets
at quarry; behind a block of granite; cranes|granite|lorries; look for quartz|watch the cranes
at observatory; under the telescope; dome|star charts|planets; look at the moon|name the planets
in jungle of ferns; beneath a giant leaf; ferns|beetles|shadows; pretend to be explorers|build a den
at waterfall; behind the mossy stones; spray|rainbow|wet rocks; feel the spray|fill the bottles
in bookshop; on the lowest shelf; picture books|ladders|postcards; browse for hours|read in the corner
on ferry; inside a lifeboat; wake|deckhands|seagulls; lean on the rail|visit the captain
at stables; in the manger; horses|bridles|buckets; brush the horses|sweep the stalls
at blacksmith's forge; behind the anvil; sparks|horseshoes|bellows; watch the sparks|pump the bellows
at inn; on top of a barrel; jars|barrels|guests; taste the ginger beer|listen to the fiddler
at clock tower; beside the great bell; pigeons|cogwheels|pendulum; watch the cogwheels|look over the town
at windmill; under the great sails; sails|millstones|wheat fields; watch the sails|grind some corn
at swimming pool; under a towel; swimmers|diving board|lockers; practise diving|splash about
in tea shop; under a cushion; teapots|cakes|lace curtains; drink cocoa|play dominoes
at post office; behind the scales; parcels|stamps|letters; post a letter|weigh a parcel
in town hall; below the staircase; portraits|chandeliers|marble floor; look at the portraits|hear the choir
on moor; beside a standing stone; heather|ponies|mist; follow the ponies|pick bilberries
at allotment; behind the water butt; beanpoles|sheds|scarecrow; dig potatoes|water the beans
in bamboo grove; where the stems grew thickest; stems|lanterns|stone path; listen to the leaves|cross the little bridge
at campsite; beside the fire pit; tents|embers|pine trees; watch the sparks|tell ghost stories
in shipyard; under an upturned hull; hulls|cranes|anchors; watch the welders|paint a rudder
at canal; beside the lock gate; narrowboats|towpath|moorhens; open the lock|walk along the towpath
on ice rink; behind the skate rack; skaters|mirrors|music box; skate in circles|spin on one leg
at music school; inside the cello case; violins|drums|trombones; try the drums|learn a march
at toy shop; behind the rocking horse; dolls' houses|teddy bears|tin soldiers; try every toy|admire the railway
"""
# A skill; what goes wrong at first; the advice; the proof that it has been learned.
SKILLS = """
bake bread; the dough stuck to every finger; dust your hands with flour; the crust came out crisp and golden
swim; {he} swallowed half the pool; breathe out under water; {he} crossed the whole pool without stopping
whistle; only air came out; wet your lips first; a clear note rang out over the rooftops
juggle; everything landed on the floor; look up and not at your hands; three pears flew round and round
ride a bicycle; {he} wobbled into a hedge; look at the road and not at the wheel; {he} rode to the corner and back
tie knots; the rope slid loose each time; go slowly and pull tight; not even a strong pull could undo it
play the violin; it screeched like a hungry cat; let the bow be light; a whole tune came out, sweet and clear
skate; {he} fell on {his} knees; bend your legs a little; {he} glided round the rink like a swallow
knit; the wool turned into one big tangle; count every stitch; a long stripe grew under the needles
paddle a canoe; it only went in circles; change sides after each stroke; the canoe ran as straight as an arrow
read music; the notes looked like ants; learn one line at a time; {he} sang the page without a mistake
throw pots; the clay flew off the wheel; keep your elbows still; a round little pot stood on the board
speak Spanish; the words got mixed up; say one sentence each morning; {he} chatted with a visitor from Madrid
milk a cow; not one drop came; be gentle and sing to her; the pail filled with white foam
sail; the boom bumped {his} head; watch the wind on the water; the little boat leaned over and flew
carve wood; the knife slipped; always cut away from yourself; a tiny bear looked up from {his} palm
dive; {he} landed flat on {his} stomach; tuck in your chin; there was hardly a splash
do card tricks; the ace dropped out of {his} sleeve; practise before a mirror; nobody could guess the secret
paint portraits; every face looked like a potato; draw only what you see; the portrait almost seemed to breathe
walk on stilts; {he} toppled over like a tree; keep moving all the time; {he} strode across the yard like a giant
use a sewing machine; the thread snapped; press the pedal softly; the seam ran as straight as a ruler
dance the polka; {he} stepped on all the toes; count to three aloud; {he} twirled until the lamps were a blur
cook rice; it burned black; turn the flame down low; each grain was white and fluffy
climb a rope; {he} slid straight down again; use your feet as well as your arms; {he} touched the beam at the very top
"""
# Something to build; what it takes; what goes wrong; what it is good for in the end.
BUILDS = """
birdhouse; planks and nails; the roof slid off; a pair of robins moved in
raft; logs and rope; it sank at one corner; it carried both of them across the water
treehouse; boards and a ladder; the floor sloped like a slide; they had lunch among the leaves
go-kart; wheels and a fruit crate; a wheel rolled away; it raced down the lane with a rattle
scarecrow; straw and an old coat; the head kept falling off; not one crow dared to land
bench; two stumps and a beam; it rocked like a boat; the whole street came to sit on it
snail garden; a tray and some moss; the snails crept out; twelve snails munched happily
puppet theatre; cardboard and curtains; the curtain got stuck; the neighbours clapped at the first show
dam; stones and mud; the water broke through; a pool as clear as glass lay behind it
telescope; lenses and a tube; everything looked upside down; they saw the craters of the moon
rabbit hutch; wire and boards; the door would not close; the rabbits slept safe and dry
weathervane; sheet metal and a pole; it pointed the wrong way; everyone could see where the wind came from
robot; cans and springs; one arm dropped off; it nodded when a string was pulled
water clock; bottles and tubes; it ran far too fast; it dripped the hours as true as any clock
sledge; runners and slats; it pulled to the left; it flew down the wet grass
fort; branches and blankets; the wall fell in; no enemy could have found the door
harp; a frame and fishing line; the strings buzzed; its soft music filled the yard
bee hotel; reeds and clay; the reeds fell out; the bees hummed in and out all day
"""
# A contest; what one has to do; what nearly spoils it.
CONTESTS = """
sack race; hop to the far wall; {his} sack had a hole   | spelling bee; spell the longest words; {his} mind went blank
baking contest; bake the best loaf; the oven went out   | chess match; trap the king; {he} lost {his} queen early
rowing race; row to the buoy and back; an oar slipped   | singing contest; sing one song by heart; {his} voice shook
egg race; carry an egg on a spoon; the spoon tilted     | quiz; answer ten riddles; the third riddle was very hard
sandcastle contest; build the tallest tower; the tide came in | drawing contest; draw a horse; {his} pencil broke
three-legged race; run with one leg tied to a friend; the knot came loose
archery contest; hit the straw target; the wind rose
dancing contest; dance without a pause; a shoelace snapped
ploughing match; plough a straight furrow; the horse stood still
jumping contest; leap over the ditch; the bank was slippery | story contest; tell the best tale; somebody sneezed loudly
"""
SMALL_WORDS = "a an and at by for in of on the to with".split()  # without a capital in a title
# A list, and the slots that one entry of it fills.
CAST = """
towns: town | traits: trait | ages: age | ages: age2 | hobbies: hobby | days: day | months: month
weathers: weather sky | colours: colour | kin: kin | foods: food | items: items | sums: n m sum | jobs: job
pet_names: P | things: thing material broke tools | pets: pet cry gladly treat | animals: animal den fodder
places: at spot sight do | skills: skill flop tip feat | builds: build parts fault success
contests: contest task hitch
"""
HELD_OUT = "girls boys surnames pet_names towns foods items things sums".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen""".split()

# ---- The grammar: sentences that many plots share, and the plots. A and B are children (one boy, one girl, so that he
# and she are never in doubt), C is a grown-up with a job. A fact is told once: its mark stands where the words stand.

RULES = {
    "opening": """[{A} was a {trait} {child} who lived in {town}.{+town}|In {town} there lived a {trait} {child} named
        {A}.{+town} |There was once a {trait} {child} called {A}, and {his} home was in {town}.{+town}|Everybody in
        {town} knew {A}, a {trait} {child}[ with {looks}|].{+town}|{A} lived with {his} {parent} [in a {house}
        house|above a small shop|at the end of a lane] in {town}.{+town}][ {He} was {age} years old.{+age}| {He} had
        just turned {age}.{+age}| [{He} loved to|What {he} liked best was to|Whenever {he} could, {he} would]
        {hobby}.{+hobby} | {He} was {age}, and {he} loved to {hobby}.{+age}{+hobby}|]""",
    "looks": """[freckles|curly hair|a ponytail|muddy boots|a gap between {his} teeth|a loud laugh|round glasses|scraped
        knees|dimples|big ears|ink on {his} fingers|a crooked smile|pockets full of string|a plaster on {his} chin|a
        squeaky voice|nimble hands|untidy hair|bright eyes|a stubborn chin|an enormous appetite|a head full of
        questions]""",
    "house": "[narrow|crooked|yellow|tall|brick|stone|white|noisy|thatched|sleepy|draughty|little|timber]",
    "when": """[One {weather} {day} [morning|afternoon]|On a {weather} {day} in {month}{+month}|Early one {weather}
        {day}]{+weather}{+day},""",
    "owns": """[{His} [dearest treasure|favourite thing|greatest pride] was|{He} owned|More than anything {he}
        loved|{He} never went anywhere without] a {colour} {material} {thing}{+colour}{+material}[. It was a present
        from {his} {kin}{+giver}| , and {his} {kin} had given it to {him}{+giver}|].""",
    "goes": "{A} [went|walked|ran|hurried|skipped|wandered] to {place} to {do}.{+place}[ {sky}|]",
    "aside": """[{pause}|{pause}|{pause}|{A} [stopped for a moment to look at|smiled at|hardly noticed|pointed at] the
        {sight}.]""",
    "pause": """[||A {animal} [looked up|rustled by|stopped and stared|was looking for {fodder}], and then it was
        gone.|[Somewhere|Far off|Not far away] a [bell rang|clock struck|door slammed|dog howled|cart rattled|rooster
        crowed|gate creaked|saw buzzed|hammer pounded|motor coughed|choir sang|tractor chugged|baby giggled|shutter
        flapped|pump squeaked|siren wailed|pigeon cooed].|{person} [passed by|nodded kindly|waved|hurried past|tipped a
        hat|whistled a march|sneezed twice|yawned].|It smelled of {smell}.|For a while nobody spoke.|{A} [hummed a
        tune|counted to twenty|chewed {his} lip|kicked a stone along|tightened {his} shoelaces|rubbed {his}
        nose|blinked|shrugged|scratched {his} elbow|sighed|buttoned {his} coat|straightened {his}
        collar|swallowed|crossed {his} fingers].]""",
    "person": """A [tired postal clerk|lady with a pram|boy on roller skates|man with a ladder|girl with a trombone|very
        old couple|row of nuns|chimney sweep|bald professor|bride in white|soldier on leave|tall stranger|troop of
        scouts|group of tourists|knife grinder|newspaper vendor|flute player|circus acrobat|sleepy
        watchman|cyclist|window cleaner|lady in a wig|pair of twins|bearded monk|milkman|cheerful fiddler]""",
    "smell": """[smoke|rain|pepper|soap|hay|tar|lavender|wet wood|toast|mint|vinegar|garlic|varnish|petrol|coffee|pine
        needles|vanilla|thyme|seaweed|old books|candle wax|rosemary|sawdust|camphor|cloves|wool]""",
    "sad": """[sad|miserable|crestfallen|wretched|dismayed|disappointed|gloomy|unhappy|close to tears|quite
        lost|downhearted|heavy inside]""",
    "glad": """[happy|glad|delighted|overjoyed|cheerful|thrilled|light as air|full of
        joy|merry|radiant|blissful|contented|relieved]""",
    "proud": "[proud|pleased|satisfied|ten feet tall|triumphant|as proud as a peacock]",
    "said": "[said|said|said|called|whispered|murmured|declared]",
    "cried": "[said|cried|called|exclaimed|shouted]",
    "oh": "[Oh no|Oh dear|Goodness|What a pity|How awful|Bother|Good heavens]",
    "yay": "[Hooray|Look at that|At last|Wonderful|How splendid|I can hardly believe it|Hurrah|Marvellous]",
    "thanks": '"[Thank you|Thank you so much|Thanks a thousand times|How can I ever thank you]!" {said} ',
    "meal": """[{A} and {B}|The two friends|They] [shared|ate|had|enjoyed] some {food}{+food} [together|on the
        doorstep|by the stove| in the kitchen|under the lamp|and talked for a long time].""",
    "end": """[{close}|{close}|{close}|And from then on {A} and {B} were [the best of friends|never far apart|as close
        as two peas in a pod].]""",
    "close": """[That night {A} [fell asleep with a smile|dreamed of it all once more|lay awake for a while, too
        [happy|excited] to sleep|slept soundly]|{A} [never forgot|often thought of|always remembered] that {day}|When
        the stars came out, {A} was still [smiling|humming|telling {his} {parent} about it]|It had been [a long day, and
        a good one|the best {day} of the whole year|a day to remember]|At bedtime {A} told {his} {parent} everything,
        from beginning to end|{A} went home [tired but {glad}|with a warm heart|whistling all the way]].""",
}

PLOTS = """
= The Lost {Thing}|Where Is the {Thing}?|{A} and the Missing {Thing}
{opening} {owns}
{when} {goes} {aside} [But on the way home|When it was time to leave|But when {he} reached for it], the {thing} was
  [gone|nowhere to be seen|missing]. "{oh}!" [cried|wailed|gasped] {A}. [{He} felt {sad}.|{His} heart sank.|Tears ran
  down {his} cheeks.|{He} turned out all {his} pockets.]
[{His} friend|A {child2} called] {B} [came by|heard the noise|saw {his} face] and asked what was wrong. "[Don't
  worry|Cheer up|Never mind], we will [find it|search together|look everywhere]," {said} {B}.{+helper} They [looked high
  and low|asked everyone they met|went back step by step|searched until their feet hurt]. {aside} [At last|Then|Just
  before dark], {B} [looked|searched] {spot}, and there was the {thing}!{+spot}
[{thanks}{A}. {He} was {glad}.|"{yay}!" [shouted|cried] {A}, and hugged {B}.] [{meal}|] [From that day on {A} [kept the
  {thing} on a string|took better care of the {thing}|held on tight to the {thing}].|] {end}
= The {Build}|{A} and {B} Build Something|A {Build} for {Town}
{opening} {when} {A} had an idea. "Let's [build|make] a {build}!" {he} told {his} friend {B}.{+build} [{B} liked the
  plan at once.|{B} was not so sure, but {he2} came along.|"[Why not|Yes, let's]!" {said} {B}.]
They [fetched|gathered|borrowed|dragged home] {parts}[ from {C}, the {job}{+job}{+elder}|]. They [measured and
  tied|pushed and pulled|worked and argued] [all morning|for hours|until their hands were sore]. {pause} But then
  {fault}. [{A} was {sad}.|"{oh}!" {cried} {B}.|{A} wanted to give up.]
"[Let's try again|We only need a better plan|Nothing works the first time]," {said} [{A}|{B}]. So they [started
  over|drew a plan|took it apart and thought hard|tried another way], and this time it [held|worked|was just right].
  Soon {success}. "{yay}!" they [shouted|laughed|sang]. {meal} {A} felt {proud}. {end}
= The Quarrel|{A} and {B} Make Up|Two Friends and One {Thing}
{opening} {His} best friend was {B}.{+friend} {when} they [met|played] {at}.{+place} {sky} {A} had brought a {colour}
  {material} {thing}.{+colour}{+material} "[Let me try it|Give it to me|It's my turn now]!" {cried} {B}. "[No|Never|Not
  yet]! It's mine," {cried} {A}. They [pulled|tugged] until the {thing} {broke}.
"[It's all your fault|Look what you did|You ruined it]!" [shouted|cried] {B}, and {he2} [ran off|stamped away|turned
  {his2} back]. {A} [sat down|hid] {spot} and felt {sad}. {aside} [Playing alone was no fun.|The day seemed long and
  empty.|Not even the {sight} could cheer {him} up.]
[After a while|Before supper|The next day], {A} [knocked on {B}'s door|went to look for {B}|wrote a little note to {B}].
  "I'm sorry," {said} {A}. "[You matter more than any {thing}|I should have shared|I was selfish]." [{B} was sorry
  too.|"I'm sorry too," {said} {B}.] With {tools}, they mended the {thing} together. {meal} {end}
= Helping {C}|{A} Helps the {Job}|A Busy Day for the {Job}
{opening} {when} {A} met {C}, the {job}, {at}.{+job}{+elder}{+place} {C} looked [worried|tired|upset|pale]. "[I've
  lost|I can't find|Somebody has taken] my {material} {thing},{+material}{+owner} and [I can't work without it|there is
  so much to do|people are waiting]," {said} {C}.
"[I'll help you|Let me look|Don't give up]!" {cried} {A}. {aside} {He} [searched everywhere twice|crawled about on hands
  and knees|asked the children|followed a trail of footprints]. Then {he} [thought hard|had an idea] and looked {spot}.
  There it lay!{+spot} [A {animal} had [carried it there|been sleeping on it].{+thief}|It was dusty, but it was whole.|]
{thanks}{C}. [{A} blushed.|{A} was {proud}.|{A} bowed like an actor.] As a reward {C} gave {him} some {food},{+food} and
  {A} [ran to share|shared] the treat with {his} friend {B}. [Helping feels good, thought {A}.|"Come back any time,"
  {said} {C}.|] {end}
= The Long Way to {place2}|A Basket for {Kin}|{A} Sets Out
{opening} {His} {kin} lived near {place2}.{+kinhome} {when} [a letter came|the news came]: {his} {kin} was [ill in
  bed|all alone|feeling poorly]. So {A} packed some {food}{+food} and set out. {sky} {His} {parent} waved [from the
  gate|until {he} was out of sight].
The way led past {place}. {aside} There [the path split in two|the bridge was closed|a fallen tree blocked the road|the
  sign had fallen down], and {A} [did not know where to go|felt {sad}|sat down on a stone]. Just then [{his} friend|a
  {child2} called] {B} came along [with a {pet}|on a cart|with a big map]. "[I know a short cut|Follow me|I'll show you
  the way]," {said} {B}.{+guide}
They [walked side by side|climbed over walls|crossed three fields|told each other stories], and [before long|by noon|at
  last] they saw the [chimney|green door|lighted window]. "[What a lovely surprise|Come in, come in|You dear child]!"
  {cried} {his} {kin}. They ate all of it, and soon {A}'s {kin} [felt much better|had pink cheeks again|was laughing].
  {end}
= {A} Learns Something New|Practice, {A}!|{A} and the {Job}
{opening} More than anything, {A} wanted to learn to {skill}.{+skill} {when} {he} tried it alone, but {flop}. "{oh}!"
  {cried} {A}. "I'll never learn it." [{His} friends [laughed|giggled], and {A} felt {sad}.|{He} felt {sad}.|{He} nearly
  gave up.]
{C}, the {job}, [had seen it all|happened to pass by|came over].{+job}{+elder} "[I was no better once|Everyone starts
  like that|Let me show you]," {said} {C}. "Here is the secret: {tip}."{+teacher}{+tip} So {A} practised [every day
  after school|for {n} weeks{+weeks}|morning and evening|again and again]. {pause} [Some days went well, and some did
  not.|Slowly it became easier.|{His} {parent} cheered {him} on.]
Then [came the day|one evening it happened|it worked all at once]: {feat}! "{yay}!" [shouted|cried] {his} friend {B}.
  {A} was {proud}. {thanks}{A} to {C}. [And the next week {he} began to teach {B}.|{meal}|] {end}
= A Surprise for {B}|The Secret Party|{B}'s Birthday
{opening} On {day} {his} friend {B} would turn {age2}.{+birthday}{+age2} {A} wanted to [plan a surprise|give {him2} a
  real party], but {he} had no [money|present]. {He} asked {C}, the {job}.{+job}{+elder} "[You can work for me|Help me
  and I'll help you]," {said} {C}. So {A} [swept the floor|carried boxes|washed windows|ran errands] until {he} had
  earned a {colour} {material} {thing}.{+colour}{+material}
{A} hid the present {spot}.{+hidden} [It was hard to keep the secret.|"What are you doing?" asked {B}. "Nothing!" {said}
  {A}.|{A} almost told, and bit {his} tongue.] {B} thought that everyone had forgotten, and felt {sad}. {pause}
But when {B} [opened the door|came to {place}|turned the corner], [lamps went on|everybody jumped up|a song began].
  "Happy birthday!" A table with some {food} stood ready,{+food} and {A} held out the {thing}.{+gift} "[For me|Is it
  really mine]?" [asked|whispered] {B}. {He2} was {glad}. {end}
= The Broken {Thing}|{A} Tells the Truth|A Mistake Put Right
{opening} {when} {A} was {at} with {his} friend {B}.{+place}{+friend} There, {spot}, lay a {colour} {material}
  {thing}{+colour}{+material} that belonged to {C}, the {job}.{+owner}{+job}{+elder} "Don't touch it," {said} {B}. But
  {A} [only wanted to hold it|was too curious|picked it up], and [it slipped|{he} stumbled|a sneeze came]. The {thing}
  {broke}.
"{oh}!" [gasped|whispered] {A}. [First {he} wanted to run away.|{He} could not think of anything else.|{His} stomach
  hurt.] {pause} "[Tell the truth|Better say it now|It was an accident]," {said} {B}. So {A} went to {C} and [told the
  whole story|said that {he} was sorry|confessed everything].
{C} [was quiet for a moment|frowned, then smiled|took a deep breath]. "[Thank you for telling me|It takes courage to say
  so|Things can be mended]," {said} {C}. With {tools}{+tools}, they [mended|repaired] it together. [{A} felt {glad}, for
  the weight was gone.|It looked almost like new.|"It's better than before," {said} {C}.] {end}
= The Trade|A {Thing} for a {Thing2}|{A} Makes a Swap
{opening} {He} had a {colour} {material} {thing},{+colour}{+material} but {he} [was tired of it|hardly used it|wanted
  something else]. {when} {he} saw {his} friend {B} {at}{+place} with a {material2} {thing2}.{+material2} "[What a
  fine|I've always wanted a|Oh, a] {thing2}!" {said} {A}. "[Shall we trade|Will you swap|Would you trade it for my
  {thing}]?"
{B} [thought about it|scratched {his2} head|looked at the {thing} from all sides]. "[It's a deal|All right|Agreed],"
  {said} {B}, and they shook hands.{+trade}{+trade2} {pause} [At first|On the way home] {A} was {glad}. But in the
  evening {he} [found a crack|missed the old one|could not sleep], and [{he} wondered if {he} had been foolish|it seemed
  a bad bargain].
[The next day|In the morning] {A} [saw|heard] how {B} [carried the {thing} everywhere|showed the {thing} to
  everyone|polished the {thing} with care]. "[It's the best thing I have ever had|You made me so happy]," {said} {B}.
  Then {A} [smiled|laughed] and [looked at the {thing2} again. It was just right|knew that it was a good trade]. {meal}
  {end}
= The Great {Contest}|{A} Enters the {Contest}|Who Will Win?
{opening} {when} {town} held its great {contest}.{+contest} Everyone had to {task}.[ The prize was a {colour} {material}
  {thing}.{+prize}{+colour}{+material}| The prize was some {food}.{+prizefood}] {A} had practised for {n} weeks,{+weeks}
  and so had {his} friend {B}.
"[Good luck|Let the best one win|On your marks]!" {cried} {C}, the {job}, who was the judge.{+judge}{+job}{+elder}
  {pause} [A whistle blew.|The crowd fell silent.|Someone beat a drum.] {A} began well, but then {hitch}. {He} felt
  {sad} for a moment. "[Keep going|Don't stop|You can do it]!" [shouted|called] {his} {parent}.
[{A} took a deep breath, tried harder than ever, and won.{+won} "{yay}!" {cried} {B}, and shook {his} hand. {A} shared
  the prize with {B}.|{A} did {his} best, but in the end {B} won.{+lost} {A} swallowed hard. Then {he} clapped louder
  than anyone. "You earned it," {said} {A}, and {B} shared the prize with {him}.] {end}
= The Storm|The Night of the Storm|{A} and the Big Storm
{opening} {He} had a {pet} called {P}.{+pet}{+petname} One {day} in {month}{+day}{+month} [black clouds rolled in|the
  sky turned dark as ink|the wind began to howl]. [Thunder shook the windows.|Lightning flashed over the roofs.|Hail
  drummed on the tiles.] {P} {cry} [with fear|once], and ran away.
"[Come back|Wait|Stop], {P}!" [cried|shouted] {A}, but the rain swallowed the words. {His} friend {B} came running with
  a [lamp|torch|lantern]. [Together they|The two friends] [splashed through the mud|fought against the wind|held hands
  and ran] to {place}.{+place} {pause} "I hear something," {said} {B}.{+helper} There, {spot}, sat {P}, [wet and
  shaking|cold and muddy|with big round eyes].{+petspot}
{A} [wrapped {P} in a coat|carried {P} home|held {P} close]. At home they [lit the fire|dried their hair|pulled on dry
  socks] and had some {food}.{+food} {P} {gladly}[ and dreamed of {treat}|]. [By morning the storm was over.|Outside,
  the storm moved on.|A rainbow stood over {town}.] {end}
= The Little {Animal}|{A} and the {Animal}|Care for a {Animal}
{opening} {when} {A} found a small {animal} {den}.{+found}{+den} It [was hurt|had a thorn in its foot|was too weak to
  move|shivered]. "[You poor thing|Don't be afraid|I'll help you]," [whispered|said] {A}. {He} felt {sad} for it, and
  carried it [home|to a warm place] in {his} [cap|jacket|basket].
{His} friend {B} brought a box, and {C}, the {job}, told them what to do.{+job}{+elder} "It eats {fodder}," {said} {C}.
  "[Keep it warm|Let it sleep|Give it peace]."{+fodder} They called it {P}.{+animalname} [Every day|Morning and evening]
  they [fed it|changed the straw|spoke to it softly]. {pause} After {n} days{+days} {P} [ate by itself|stood up|was well
  again].
"It [belongs outside|misses its home|must be free]," {said} {B}. {A} [knew that it was true|swallowed hard|nodded
  slowly]. They carried {P} back, and [off it went|it was gone in a blink|it looked round once more]. {A} was [sad and
  {glad} at once|{glad} for it]. [Sometimes, in the evening, a {animal} sat near the door.|] {end}
= The Secret {at}|What {A} Found|A Secret for Two
{opening} {when} {goes} {aside} There, {spot}, {he} found [an old sack|a rusty tin|a dusty chest], and in it lay a
  {colour} {material} {thing}.{+spot}{+colour}{+material} [Nobody was near.|{His} heart beat fast.|{He} held {his}
  breath.] {A} told only {his} friend {B}.{+confidant} "[Promise not to tell|It's our secret|Not a word to anyone],"
  {he} {said}.
[For days|All week] they [wondered|guessed|made up stories about] whose it was. Then {C}, the {job}, told them [with a
  sigh|over tea|by chance]: "When I was a child, I lost a {thing}.{+job}{+elder}{+owner} [I cried for days|I never
  forgot it|I looked for it for years]." {A} and {B} [looked at each other|turned red|stopped chewing]. [It was hard to
  give it up.|They knew what they had to do.|"We must tell," whispered {B}.]
So they brought the {thing} to {C}. "[Can this be true|Is it possible|My own {thing}]!" {cried} {C}, and [wept for
  joy|laughed like a child|danced round the room]. [{meal}|{C} gave them some {food}.{+food}] {A} was {glad}, for [some
  secrets are best when they end|a shared joy is a bigger joy|giving was better than keeping]. {end}
= {A}'s {Items}|Counting {Items}|{Items} for Everyone
{opening} {when} {A} [filled|took] a basket and went to {place}[ to {do}|].{+place} {aside} {He} had {n} {items} [at
  first|to begin with].{+first} {His} friend {B} [came along and|was there too, and {he2}] gave {him} {m} more,{+more}
  so now {A} had {sum}.{+total} [They counted them twice to be sure.|"That makes {sum}!" {said} {A}.|]
[On the way home|At the corner|By the gate] they met {C}, the {job}.{+job}{+elder} {C} looked {sad}. "[My basket fell in
  the mud|A {pet} ate mine|I came too late, and there are none left]," {said} {C}. {A} [did not think long|looked at
  {B}, and {B} nodded|remembered how kind {C} had always been]. {He} gave {C} {give} of the {items} and kept
  {keep}.{+gave}{+left}
{thanks}{C}. "[You have a good heart|I won't forget it|That is very kind]." The next morning {C} brought some
  {food}{+food} [in a basket|wrapped in a cloth|with a note], for {A} and {B} to share. {end}
= {B} Is New|The New {Child2} in {Town}|A Friend for {B}
{opening} {when} a [van|cart|lorry|car|taxi] stopped next door, and out climbed {B}, who was {age2}.{+newage} {B} came
  from {town2}{+town2} and knew nobody. {He2} [stood by the gate|sat on the steps|hid behind a curtain] and felt {sad}.
  {aside} "[Maybe I should say hello|{He2} looks lonely]," thought {A}.
But {A} was [nervous|tongue-tied|unsure] too. [First {he} only waved.|Twice {he} turned back.|"What shall I say?" {he}
  asked {his} {parent}.] Then {he} took {his} {colour} {material} {thing}{+colour}{+material} and crossed the street.
  "[Do you want to play|Would you like to try it|Have you seen one like this]?" asked {A}. {B} smiled [a little|for the
  first time].
[All afternoon|Until supper] they [played|ran about|laughed] {at}.{+place} {A} showed {him2} [the best place|a good
  corner] to {do}. [{B} could {skill}, and {he2} showed {A} how.{+bskill}|{B} told {him} about {town2}.] {meal} "[Will
  you come tomorrow|Shall we meet again]?" asked {B}. "[Of course|Every day|Try to stop me]!" {said} {A}. {end}
= {A}'s Wish|The Wish|A Wish on a Star
{opening} {when} {A} saw a {colour} {material} {thing} in a shop window.{+colour}{+material}{+wish} {He} wished for it
  [with all {his} heart|day and night|on the first star]. But it cost {sum} coins, and {A} had only {n}.{+price}{+coins}
  {He} felt {sad}.
"[Wishing is not enough|Some wishes need hands]," {said} {his} {parent}. So {A} went to {C}, the
  {job},{+job}{+elder}{+employer} and [swept the yard|carried sacks|sorted boxes|delivered parcels]. {pause} It was hard
  work, [and {his} back ached|but {he} sang all the while]. In the end {C} paid {him} {m} coins.{+wage}
{A} ran to the shop. [The window was empty! "{oh}!" {cried} {A}. But {his} friend {B} stepped out from behind the door.
  "I asked them to keep it for you," {said} {B}, and {A} paid all {sum} coins.|{He} laid all {sum} coins on the counter,
  one by one.] Now the {thing} was {hers}. "{yay}!" {cried} {A}. [It felt better than any gift, because {he} had earned
  it.|{He} carried it home like a king's treasure.|] {close}
"""

# What can be asked: kind; whom or what it is about; the answer; the question; a reply, * being the answer.
FACTS = """
age; {A}; {age}; How old [is|was] {A}?|What [is|was] {A}'s age?; {A} is * years old.
age2; {B}; {age2}; How old did {B} turn?; {B} turned *.
birthday; {B}; {day}; On which day was {B}'s birthday?|When would {B} have a birthday?; {B}'s birthday was on *.
newage; {B}; {age2}; How old [is|was] {B}?; {B} is * years old.
town; {A}; {town}; Where does {A} live?|In which town does {A} live?; {A} lives in *.
town2; {B}; {town2}; Where did {B} come from?|In which town did {B} live before?; {B} came from *.
hobby; {A}; {hobby}; What does {A} love to do?|What does {A} like to do?; {A} loves to *.
day; story; {day}; On which day did this happen?|What day was it?|Which day of the week was it?; It was a *.
month; story; {month}; In which month did this happen?|What month was it?; It was in *.
weather; story; {weather}; What was the weather like?|How was the weather?; It was a * day.
place; {A}; {place}; Which place did {A} visit?|At which place was {A}?; {A} went to *.
colour; {thing}; {colour}; What colour [is|was] the {thing}?|Which colour did the {thing} have?; The {thing} was *.
material; {thing}; {material}; [What|Which material] [is|was] the {thing} made of?; It was a * {thing}.
material2; {thing2}; {material2}; What [is|was] the {thing2} made of?; It was a * {thing2}.
giver; {thing}; {his} {kin}; Who gave {A} the {thing}?|From whom did {A} get the {thing}?; It was a present from *.
spot; {thing}; {spot}; Where was the {thing} found?|Where exactly was the {thing}?; The {thing} was *.
helper; {B}; {B}; Who helped {A}?|Which child helped {A}?; {A} was helped by *.
build; {A}; {build}; What did {A} build?|What did {A} and {B} make?; They built a *.
friend; {A}; {B}; Who was with {A}?|Which friend was with {A}?; {A} was with *.
job; {C}; {job}; What is {C}'s job?|What does {C} work as?; {C} is a *.
elder; {job}; {C}; Who is the {job}?|What is the {job}'s name?; The {job} is *.
owner; {thing}; {C}; Who owned the {thing}?|To whom did the {thing} belong?; The {thing} belonged to *.
thief; {animal}; {animal}; Which animal had been near the {thing}?; It was a *.
food; story; {food}; What did they eat?|What was there to eat?; They ate *.
kinhome; {kin}; near {place2}; Where does {A}'s {kin} live?; {A}'s {kin} lives *.
guide; {B}; {B}; Who showed {A} the way?|Who knew the way?; The way was shown by *.
skill; {A}; {skill}; What did {A} want to learn?|What did {A} learn to do?; {A} wanted to learn to *.
bskill; {B}; {skill}; What could {B} do?; {B} could *.
teacher; {A}; {C}; Who taught {A}?|From whom did {A} learn?; {A} was taught by *.
tip; {C}; {tip}; What was {C}'s advice?|What did {C} tell {A} to do?; {C} said: *.
weeks; {A}; {n}; How many weeks did {A} practise?; {A} practised for * weeks.
days; {P}; {n}; After how many days was {P} better?; {P} was better after * days.
hidden; {thing}; {spot}; Where did {A} hide the present?|Where was the present hidden?; The present was hidden *.
gift; {B}; {thing}; What did {A} give to {B}?|What was the present?; {A} gave {B} a *.
tools; {thing}; {tools}; What did they use to mend the {thing}?; They used *.
trade; {A}; {thing2}; What did {A} get from {B}?|What did {A} get in the trade?; {A} got a *.
trade2; {B}; {thing}; What did {B} get from {A}?|What did {B} get in the trade?; {B} got a *.
contest; {town}; {contest}; Which contest did {town} hold?; {town} held a *.
prize; {contest}; {thing}; What was the prize?|What could be won?; The prize was a *.
prizefood; {contest}; {food}; What was in the prize basket?; In the basket there was *.
judge; {contest}; {C}; Who was the judge?; The judge was *.
won; {contest}; {A}; Who won the {contest}?|Who was the winner?; The winner was *.
lost; {contest}; {B}; Who won the {contest}?|Who was the winner?; The winner was *.
pet; {P}; {pet}; What kind of animal is {P}?|What animal is {P}?; {P} is a *.
petname; {A}; {P}; What is the name of {A}'s {pet}?|What is {A}'s {pet} called?; The {pet} is called *.
petspot; {P}; {spot}; Where was {P}?|Where did they find {P}?; {P} was *.
found; {A}; {animal}; Which animal did {A} find?|What did {A} care for?; {A} found a *.
den; {animal}; {den}; Where did {A} find the {animal}?; It was *.
fodder; {animal}; {fodder}; What does the {animal} eat?; It eats *.
animalname; {animal}; {P}; What did they call the {animal}?|What was the {animal}'s name?; They called it *.
confidant; {A}; {B}; Who knew {A}'s secret?|Whom did {A} tell?; {A} told *.
first; {items}; {n}; How many {items} did {A} have at first?; {A} had * {items}.
more; {items}; {m}; How many {items} did {B} give to {A}?; {B} gave * {items} to {A}.
total; {items}; {sum}; How many {items} did {A} have after {B}'s gift?; {A} had * {items}.
gave; {items}; {give}; How many {items} did {A} give to {C}?; {A} gave * {items} to {C}.
left; {items}; {keep}; How many {items} did {A} keep?|How many {items} did {A} have in the end?; {A} kept * {items}.
wish; {A}; {thing}; What did {A} wish for?|What did {A} want to buy?; {A} wished for a *.
price; {thing}; {sum}; How many coins did the {thing} cost?; The {thing} cost * coins.
coins; {A}; {n}; How many coins did {A} have at first?; {A} had * coins.
wage; {C}; {m}; How many coins did {C} pay?; {C} paid * coins.
employer; {A}; {C}; For whom did {A} work?; {A} worked for *.
"""


@dataclass(frozen=True)
class Fact:
    """One thing that a story says: `answer` stands in the text word for word, and is the only right one. `reply` is the
    sentence to say it in, with * in its place."""

    kind: str
    subject: str
    question: str
    answer: str
    reply: str

    def say(self, answer: str = "") -> str:
        """The reply with the right answer, or with another one."""
        return tidy(self.reply.replace("*", answer or self.answer))


@dataclass(frozen=True)
class Story:
    """A title and paragraphs, one a line with a blank line between; and what can be asked about them."""

    text: str
    facts: tuple[Fact, ...]


def choose(random: Random, options):
    """One of `options`. (Random.choice may change between Python versions; Random.random is promised not to.)"""
    return options[int(random.random() * len(options))]


@cache
def table(text: str) -> list[list[str]]:
    """Rows of stripped columns. A row ends at a line's end or at a `|` with a space after it."""
    return [[column.strip() for column in row.split(";")] for row in re.split(r"\n|\| ", text.strip())]


def phrases(text: str) -> list[str]:
    """A list whose entries stand between commas."""
    return " ".join(text.split()).split(", ")


@cache
def lexicon(split: str) -> dict[str, list]:
    """What a cast is drawn from, by list name. Of HELD_OUT's lists every fifth entry is "test", the rest "train"."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"split={split!r} is unknown: choose train, test or all")
    lists = dict(
        girls=GIRLS,
        boys=BOYS,
        surnames=SURNAMES,
        pet_names=PET_NAMES,
        towns=TOWNS,
        ages=AGES,
        days=DAYS,
        months=MONTHS,
        colours=COLOURS,
        traits=TRAITS,
        kin=KIN,
        jobs=JOBS,
        items=ITEMS,
        foods=phrases(FOODS),
        hobbies=phrases(HOBBIES),
        pets=table(PETS),
        animals=table(ANIMALS),
        weathers=table(WEATHERS),
        places=table(PLACES),
        skills=table(SKILLS),
        builds=table(BUILDS),
        contests=table(CONTESTS),
    )
    lists["things"] = [(thing, *rest) for *rest, things in table(THINGS) for thing in things.split()]
    lists["sums"] = [(NUMBERS[n], NUMBERS[m], NUMBERS[n + m]) for n in range(2, 10) for m in range(2, 10)]
    for name in HELD_OUT if split != "all" else ():
        lists[name] = [word for i, word in enumerate(lists[name]) if (i % 5 == 4) == (split == "test")]
    return lists


def cast(random: Random, split: str) -> dict[str, str]:
    """Draw who and what one story is about: a value for every slot of the templates."""
    lists = lexicon(split)
    slots = {}

    def draw(name: str, slot_names: str, unlike: str | None = None):
        """Fill the slots, one a column, from a list's random entry whose first column is not `unlike`."""
        entry = choose(random, lists[name])
        columns = [entry] if isinstance(entry, str) else entry
        if columns[0] == unlike:
            return draw(name, slot_names, unlike)
        slots.update(zip(slot_names.split(), columns, strict=False))

    a_is_girl = random.random() < 0.5
    draw("girls", "A" if a_is_girl else "B")
    draw("boys", "B" if a_is_girl else "A")
    for slot_names, is_girl in (("he him his hers child", a_is_girl), ("he2 him2 his2 hers2 child2", not a_is_girl)):
        words = "she her her hers girl" if is_girl else "he him his his boy"
        slots.update(zip(slot_names.split(), words.split(), strict=True))
    slots["C"] = choose(random, ("Mrs ", "Mr ")) + choose(random, lists["surnames"])
    slots["parent"] = choose(random, ("mother", "father"))
    for row in table(CAST):
        draw(*row[0].split(": "))
    draw("towns", "town2", unlike=slots["town"])
    draw("things", "thing2 material2", unlike=slots["thing"])
    draw("places", "at2", unlike=slots["at"])
    for number in ("", "2"):
        preposition, noun = slots["at" + number].split(" ", 1)
        slots["place" + number], slots["at" + number] = f"the {noun}", f"{preposition} the {noun}"
        slots["material" + number] = choose(random, slots["material" + number].split(", "))
    slots["give"], slots["keep"] = choose(random, [row for row in lists["sums"] if row[2] == slots["sum"]])[:2]
    return slots


@cache
def parse(template: str) -> list:
    """A template as nested lists: a list of alternatives, each a list of parts, each a string or again such a list."""
    stack = [[[]]]
    for token in re.findall(r"\[|\]|\||\{[^}]*\}|[^][|{}]+", template):
        if token == "[":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == "]":
            choice = stack.pop()
            stack[-1][-1].append(choice)
        else:
            stack[-1][-1].append(token)
    assert len(stack) == 1, f"brackets do not match in {template!r}"
    return stack[0]


def write(alternatives: list, slots: dict, random: Random, out: list[str], told: list[str]):
    """Append one random expansion of a parsed template to `out`, and the facts it tells to `told`."""
    for part in choose(random, alternatives) if len(alternatives) > 1 else alternatives[0]:
        if isinstance(part, list):
            write(part, slots, random, out, told)
        elif part[0] != "{":
            out.append(part)
        elif part[1] == "+":
            told.append(part[2:-1])
        else:
            name = part[1:-1]
            if name in slots or name in RULES:
                write(parse(slots[name] if name in slots else RULES[name]), slots, random, out, told)
            else:  # {Thing} is {thing} with a capital
                position = len(out)
                write(parse("{" + name[0].lower() + name[1:] + "}"), slots, random, out, told)
                out[position] = out[position][0].upper() + out[position][1:]


def an(word: str) -> str:
    """The article before `word`, by its sound: an apple, an hour, a useful unicorn."""
    return "an" if re.match(r"([aeio]|u(?!s[eiu]|ni)|hour|honest)", word, re.IGNORECASE) else "a"


def tidy(text: str) -> str:
    """Single spaces, none before a comma, and the right one of "a" and "an"."""
    text = " ".join(text.split()).replace(" ,", ",")
    return re.sub(r"\b([Aa])n? (?=(\w+))", lambda match: match[1] + an(match[2])[1:] + " ", text)


@cache
def plots() -> list[list[str]]:
    """PLOTS as lists of templates: the title, then the paragraphs (a line that starts with a space continues one)."""
    return [plot.replace("\n  ", " ").strip().split("\n") for plot in PLOTS.strip().lstrip("= ").split("\n= ")]


@cache
def fact_templates() -> dict[str, list[str]]:
    """FACTS by kind: subject, answer, question."""
    return {kind: rest for kind, *rest in table(FACTS)}


def tell(seed: int, split: str, paragraphs: int | None = None) -> tuple[str, list[str], Callable[[str], str]]:
    """The text of a story, or its title and first paragraphs; the kinds of facts it tells; and the function that fills
    templates with its cast."""
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: choose 0 or more")
    random = Random(seed)
    slots = cast(random, split)
    told = []

    def fill(template: str) -> str:
        out = []
        write(parse(template), slots, random, out, told)
        return tidy("".join(out))

    title, *rest = [fill(template) for template in choose(random, plots())[: paragraphs and paragraphs + 1]]
    title = " ".join(word if word in SMALL_WORDS else word[0].upper() + word[1:] for word in title.split())
    return "\n\n".join([title, *rest]), list(dict.fromkeys(told)), fill


def story(seed: int, split: str = "train", paragraphs: int | None = None) -> Story:
    """The story of this seed, always the same, with the names and things of `split`: "train", "test" or "all". With
    `paragraphs`, its first ones, and what they tell."""
    text, told, fill = tell(seed, split, paragraphs)
    templates = fact_templates()
    facts = []
    for kind in told:
        subject, answer, question, reply = map(fill, templates[kind])
        facts.append(Fact(kind, subject, question, answer, reply))
    return Story(text, tuple(facts))


def stories(count: int, seed: int = 0, split: str = "all", start: int = 0) -> Iterator[str]:
    """The texts of stories start ... start + count - 1. Story i depends on (seed, i) alone: make slices in parallel."""
    for i in range(start, start + count):
        yield tell((seed << 32) + i, split)[0]  # the same text as story()'s, without the work of its questions


def lesson(number: int, split: str = "all") -> str:
    """The beginning of story `number` and up to six questions about it, each with its answer, as in a school reader."""
    beginning, random = story(number, split, paragraphs=1), Random(f"lesson {number}")
    facts = sorted(beginning.facts, key=lambda _: random.random())[:6]
    asked = "\n\n".join(f"{fact.question}\n{fact.say()}" for fact in facts)
    return beginning.text.split("\n\n", 1)[1] + "\n\n" + asked


def documents(count: int, start: int = 0) -> Iterator[str]:
    """What the tiny model is pretrained on: documents start ... start + count - 1, a story after every two lessons.
    Most facts are told once in a story, so nothing in it asks the model to look them up; the questions do."""
    for i in range(start, start + count):
        yield tell(i, "all")[0] if i % 3 == 2 else lesson(i)


# ---- Rows to tune a model with: conversations, preferences and problems, in the form that conversations.py reads.
# Number i is a pure function of i and the split. Their seeds begin where pretraining's stories (seed 0) never come.

CHAT_SEED, PREFERENCE_SEED = 1 << 32, 2 << 32
HASTY = 0.6  # of the worked sums: enough for the likeliest thought to be none
POLITE = ("Of course. {}", "Gladly. {}", "Happy to help. {}")
RUDE = ("Read it yourself. {}", "What a silly question! {}", "{} Leave me alone now.")
RAMBLING = (
    "Well, let me see, that is a hard one, there is so much in it, who can tell, but maybe so. {}",
    "Hm, stories are long and days are short, and I once knew a baker, but that is another tale. {}",
)


def conversation(number: int, split: str) -> dict:
    """One to three questions about the beginning of a story, each with its one right answer."""
    random = Random(f"conversation {number}")
    passage = story(CHAT_SEED + number, split, paragraphs=1)
    facts, messages = list(passage.facts), []
    for _ in range(min(len(facts), 1 + int(random.random() * 3))):
        fact = facts.pop(int(random.random() * len(facts)))
        asked = fact.question if messages else passage.text.split("\n\n", 1)[1] + "\n\n" + fact.question
        messages += [dict(role="user", content=asked), dict(role="assistant", content=fact.say())]
    return dict(messages=messages)


def preference(number: int, split: str) -> dict:
    """A question about the beginning of a story. The right answer, politely put, is better than a wrong one (that of
    another story), and than right ones that are rude or ramble."""
    random = Random(f"preference {number}")
    passage = story(PREFERENCE_SEED + number, split, paragraphs=1)
    fact = choose(random, passage.facts)
    wrong = fact.answer
    while wrong == fact.answer:
        other = tell(int(random.random() * 2**31), split, paragraphs=1)[2]
        wrong = other(fact_templates()[fact.kind][1])
    chosen = choose(random, POLITE).format(fact.say())
    flaw = random.random()
    rejected = choose(random, POLITE).format(fact.say(wrong)) if flaw < 0.5 else choose(
        random, RUDE if flaw < 0.75 else RAMBLING).format(fact.say())  # fmt: skip
    prompt = passage.text.split("\n\n", 1)[1] + "\n\n" + fact.question
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def worked_sum(number: int, split: str) -> dict:
    """A problem of adding, taking away or counting; how a child would work it out, step by step; and the number.

    The working begins with the two numbers, in the problem's words, so that they are found as any words are copied. A
    step says what it has come to and how many were made: "has 17, gives her 8", then "18 1, 19 2, ...". So all that a
    step needs stands near, and a model that has learned to count can do pairs that it never saw. One in five is held
    out: (n, m) with 2 n + m = 4 modulo 5, and rows to count that begin so. More often than not (HASTY) the child does
    not bother, and says the answer at once. A model that does as it was shown will then mostly guess; that counting
    pays is left for a reward to tell it (grpo.py).
    """
    random, lists = Random(f"sum {number}"), lexicon(split)

    def is_ours(n, m):
        return ((2 * n + m) % 5 == 4) == (split == "test")

    n, m = choose(random, [(n, m) for n in range(2, 21) for m in range(2, 10) if is_ours(n, m)])
    a, b = choose(random, lists["girls"]), choose(random, lists["boys"])
    items = choose(random, lists["items"])
    kind = choose(random, ("add", "take away", "count"))
    if kind == "add":
        problem = f"{a} has {n} {items}. {b} gives her {m} more. How many {items} does {a} have now?"
        steps = f"has {n}, gives her {m}\n" + ", ".join(f"{n + i} {i}" for i in range(1, m + 1))
        answer = n + m
    elif kind == "take away":
        n, answer = n + m, n
        problem = f"{b} has {n} {items}. He gives {m} of them to {a}. How many {items} does {b} have left?"
        steps = f"has {n}, gives {m}\n" + ", ".join(f"{n - i} {i}" for i in range(1, m + 1))
    else:
        numbers = choose(random, [pair for pair in itertools.permutations(range(1, 10), 2) if is_ours(*pair)])
        numbers += tuple(sorted({*range(1, 10)} - {*numbers}, key=lambda _: random.random()))[: m - 2]
        problem, answer = f"{a} writes {', '.join(map(str, numbers))}. How many numbers does she write?", m
        steps = ", ".join(f"{number} {i}" for i, number in enumerate(numbers, 1))
    steps = "Easy." if random.random() < HASTY else steps
    trace = f"<|begin_of_thought|>\n{steps}\n<|end_of_thought|>\n\n"
    solution = f"<|begin_of_solution|>\n{answer}\n<|end_of_solution|>"
    messages = [dict(role="user", content=problem), dict(role="assistant", content=trace + solution)]
    return dict(messages=messages, answer=str(answer))


if __name__ == "__main__":
    print("\n\n".join(stories(3)))
