"""Plain English on everyday subjects, written for this project: the "general text" of drift and likelihood measures.

Forty passages of sixty to eighty words. No arithmetic tasks, no think marks, nothing quoted: a model tuned on a task
should find these about as likely as before.
"""

GENERAL_TEXT: tuple[str, ...] = (
    "The bakery on the corner opens before sunrise, when the street is still dark and the only light comes from its "
    "ovens. By six o'clock a short line of regulars has formed at the door. They know one another by sight, if not by "
    "name, and they talk about the weather while they wait. The first loaves are sold while they are still too hot to "
    "slice.",
    "Tides are caused mainly by the pull of the moon, with some help from the sun. As the earth turns, each stretch of "
    "coast passes through regions where the water is slightly raised and slightly lowered. The shape of the shore "
    "matters as well. A narrow bay can funnel the water and make the difference between high and low tide far larger "
    "than it is on an open beach.",
    "My grandmother kept her letters in a biscuit tin under the stairs. When we finally opened it, we found that she "
    "had sorted them by sender rather than by date, so that each friendship could be read from beginning to end. Some "
    "bundles were thick and tied with ribbon. Others held a single envelope, and those were the ones we wondered about "
    "the most.",
    "A bicycle chain lasts longer if it is cleaned often and oiled sparingly. Too much oil collects dust, and the dust "
    "turns into a paste that grinds away at the metal. Wipe the chain with a dry cloth after riding in the rain, let "
    "it dry, and then put one small drop on every link. Turn the pedals backwards a few times and wipe off what is "
    "left.",
    "The town library has lent out musical instruments since last spring. There are ukuleles, a few violins in small "
    "sizes, and one rather battered accordion that is always on loan. The librarians say the idea came from a reader "
    "who wanted to try the cello before buying one. They have not found a cello yet, but the waiting list for the "
    "accordion keeps growing.",
    "Foxes have adapted well to life in cities. They sleep during the day under garden sheds or in overgrown railway "
    "cuttings, and they come out at dusk to look for food. Their diet includes worms, mice, fallen fruit and whatever "
    "people leave in open bins. Most residents never notice them, although the cries they make in winter can be "
    "startling to anyone hearing them for the first time.",
    "When the power failed, the whole building became quiet at once. The refrigerators stopped humming, the lift "
    "stood still between two floors, and neighbours who had never spoken came out onto the landing with candles. "
    "Somebody brought a radio that ran on batteries. Within an hour there was soup on a camping stove, and the "
    "children did not want the lights to come back on.",
    "A good map leaves things out. If every path, fence and ditch were drawn, the reader would be unable to find the "
    "road. The person who makes the map has to decide who will use it and for what purpose. A sailor needs depths and "
    "lights, a walker needs hills and footpaths, and a driver needs junctions. The same land can be drawn in all three "
    "ways without any of them being wrong.",
    "The committee met on Thursday to discuss the future of the swimming pool. Repairs to the roof would cost more "
    "than the council had expected, and some members thought that a new building would be cheaper in the long run. "
    "Others pointed out that the old pool was within walking distance of two schools. No decision was taken, but an "
    "engineer has been asked to write a report.",
    "Tea was once so expensive that it was kept in locked boxes. The lady of the house carried the key, and the leaves "
    "were often used a second time by the servants. As trade grew and prices fell, the drink spread to every kitchen "
    "in the country. The boxes remained, but the locks were no longer needed, and today they are mostly seen in "
    "antique shops.",
    "Learning to prune an apple tree takes patience. The aim is to let light and air reach the middle of the crown, so "
    "the gardener removes branches that cross, branches that are dead, and shoots that grow straight upward. It is "
    "best to step back after every few cuts and look at the tree from a distance. A branch that has been taken off "
    "cannot be put back.",
    "The night train leaves the capital at ten and reaches the coast in time for breakfast. In the sleeping cars the "
    "beds are narrow but clean, and an attendant brings coffee half an hour before arrival. Some travellers claim they "
    "cannot sleep on a train. Others say that the steady sound of the wheels is the best cure for a restless mind "
    "they have ever found.",
    "Concrete does not harden by drying out. The powder in it reacts with water and forms crystals that lock the sand "
    "and the stones together, and this goes on for weeks after the surface feels firm. For that reason builders keep "
    "fresh concrete damp in hot weather. If the water leaves too soon, the reaction stops early and the finished floor "
    "is weaker than it should be.",
    "She had promised herself not to buy any more plants, but the market was closing and the seller was tired. For the "
    "price of a sandwich she carried home a fig tree in a cracked pot. It lost every leaf within a week. She kept "
    "watering it anyway, out of stubbornness, and in April a green point appeared at the tip of the lowest branch.",
    "Many birds find their way over long distances by using more than one compass. They can follow the position of the "
    "sun, the pattern of the stars and the magnetic field of the earth, and they seem to compare these with one "
    "another. Young birds of some species make their first journey alone. They inherit a direction, but the details of "
    "the route are learned by experience.",
    "The new manager began by asking everyone what they would change. Most people mentioned small things: a printer "
    "that jammed, a door that would not close, a weekly meeting that nobody needed. She fixed those first. By the time "
    "she raised larger questions about how the work was organised, people had seen that she listened, and they were "
    "willing to tell her what they really thought.",
    "Salt has been used to preserve food for thousands of years. It draws water out of meat and fish, and without "
    "water the organisms that cause decay cannot grow. Towns became rich by producing it, roads were built to carry "
    "it, and rulers taxed it because nobody could do without it. Cheap refrigeration has taken over the task, but the "
    "taste for salted food has stayed.",
    "On the last day of the holiday it rained so hard that we could not see the lake from the window. We played cards "
    "with a pack that was missing a queen, read the newspapers that had been left to light the fire, and cooked "
    "everything that remained in the cupboard. Years later my brother still says that it was the best day of the whole "
    "trip.",
    "A violin is held together by glue that is meant to fail. If the wood shrinks in a dry winter, the joint opens "
    "before the thin top can crack, and a repairer can close it again in an afternoon. A stronger glue would be more "
    "convenient for the maker and far worse for the instrument. Some of the oldest violins have been opened and closed "
    "dozens of times.",
    "The ferry runs twice a day in summer and once in winter, if the wind allows. Islanders plan their lives around "
    "it. The doctor comes on Tuesdays, the post arrives before noon, and building materials must be ordered weeks "
    "ahead. Visitors sometimes find the timetable inconvenient. People who live there say that it gives every day a "
    "shape, and that a missed boat is never a good reason for worry.",
    "Soap works because its molecules have two different ends. One end is attracted to water and the other to grease, "
    "so they gather around a droplet of oil and carry it away when the water is rinsed off. Plain water slides over a "
    "greasy plate without taking much along. Warm water helps because it softens the fat, but without soap most of the "
    "fat would stay where it is.",
    "The old cinema had been closed for ten years when a group of neighbours bought it together. They painted the "
    "foyer, mended the seats one row at a time, and learned how to run the projector from a retired engineer. On the "
    "opening night the film broke in the middle of the second reel. The audience applauded, and somebody passed round "
    "a bag of oranges until it started again.",
    "Before a long walk in the mountains it is wise to tell someone where you are going and when you expect to be "
    "back. The weather can change within an hour, and a path that was easy in the morning may be slippery by the "
    "afternoon. Carry a map, a warm layer and more water than you think you will need. Turning back early is not a "
    "failure but a decision.",
    "The history of the button is longer than that of the buttonhole. For centuries buttons were sewn on clothes as "
    "decoration, while garments were closed with pins, laces or belts. Once tailors began to cut reinforced slits in "
    "the cloth, clothes could be made to fit the body closely. Fashions changed quickly after that, and the humble "
    "button became one of the most common objects in the household.",
    "Our neighbour repairs clocks in the room above his garage. He says that most of them are not broken but merely "
    "dirty, and that people bring them in only when they have already bought something else. He cleans each part in a "
    "small bath, lays the wheels out in order on a white cloth, and writes the date of the repair inside the case with "
    "a pencil.",
    "Honey bees tell one another about flowers by dancing. A bee that has found a good patch returns to the hive and "
    "runs in a figure on the comb. The angle of the dance gives the direction with respect to the sun, and its length "
    "gives the distance. Others follow close behind in the dark, touching her with their antennae, and then fly out to "
    "search for the place themselves.",
    "The first draft of the report was far too long. The author had included every table, every conversation and every "
    "doubt, so that the reader could not tell which of them mattered. Her editor asked a single question: what should "
    "somebody do differently after reading this? She threw away two thirds of the pages. The remaining third took as "
    "long to write as all the rest had taken.",
    "In autumn the leaves of many trees turn yellow because the green pigment that normally hides the other colours is "
    "broken down. The tree takes back what it can use and stores it in the trunk and the roots. Red is different, for "
    "it is often made anew during the last weeks. Cool nights and bright days make the strongest colours, which is why "
    "no two years look the same.",
    "A small choir rehearses in the church hall every Monday evening. There is no audition, and the only rule is that "
    "members should try to be on time. Some can read music, while others learn their part by ear from the person "
    "standing beside them. They give one concert a year. The proceeds pay for the heating, and whatever is left is "
    "spent on a cake for the final rehearsal.",
    "The desert is not as empty as it seems at midday. Most of the animals stay below the ground, where the air is "
    "cooler and a little damp, and come out when the sun has set. In the morning the sand is covered with tracks. "
    "Someone who knows how to read them can tell which beetle crossed the dune, which lizard followed it, and where "
    "the chase came to an end.",
    "He learned to cook from a radio programme, because there was no cookery book in the house. The presenter "
    "described each step slowly and never gave exact amounts. You should add flour, she would say, until the dough no "
    "longer sticks to your fingers. He still cooks in that manner and finds printed recipes confusing, since they tell "
    "him how much to use but not what he should feel.",
    "Streets in the old quarter are too narrow for lorries, so parcels arrive by cargo bicycle. The riders know which "
    "bells are broken and which shopkeeper will take a delivery for somebody else. In winter they fit tyres with small "
    "spikes. The city has counted the journeys and found that the bicycles are faster than vans over short distances, "
    "mainly because they never have to look for a place to park.",
    "Glass is made from sand, soda and lime, melted together at a great heat. For a long time only small panes could "
    "be produced, which is why old windows are divided into many squares. Later it was discovered that molten glass "
    "could be floated on a bath of liquid tin. The sheet spreads out evenly and cools with two smooth faces, and it "
    "needs no polishing at all.",
    "The school garden was planted by a class that has long since left. Each year the youngest pupils are given a bed "
    "and may grow whatever they like, provided that they look after it. Radishes are popular because they appear so "
    "quickly. Pumpkins are popular for the opposite reason: they ripen after the summer holiday, when everyone has "
    "almost forgotten about them, and come as a surprise.",
    "An orchestra tunes to the oboe, and there are several stories about why. The most convincing is that its note is "
    "clear and steady, and that the player can do little to change it on the spot. Everyone else has to adjust. The "
    "strings follow first, then the woodwind and the brass, and for half a minute the hall is filled with a sound that "
    "many listeners enjoy as much as the music.",
    "Insurance began with merchants who shared the danger of losing a ship. Each of them paid a little into a common "
    "purse, and whoever was unlucky received enough to begin again. The principle has not changed, although the "
    "contracts have grown longer. It works as long as misfortunes do not strike everybody at the same moment, which is "
    "exactly what makes floods and earthquakes so difficult to insure.",
    "The dog was found beside the motorway with no collar and a great deal of confidence. He walked into the shelter "
    "as though he had booked a room there. Three families came to see him in the first week, and he ignored them all. "
    "Then an elderly man came in to ask for directions. The dog got up, followed him to the door, and has lived with "
    "him ever since.",
    "Paper can be recycled several times, but not for ever. Each time the fibres are soaked and pressed they become "
    "shorter, until they are too short to hold together. A sheet made from old newspapers usually contains some fresh "
    "pulp for strength. Cardboard is less demanding than writing paper, and egg boxes are less demanding still, so the "
    "same fibre may pass through all three on its way.",
    "It was the custom in the village to leave the first row of the orchard unpicked. Travellers could take what they "
    "needed, and the birds had the rest. Nobody remembered who had started it. When the land was sold, the new owner "
    "asked whether it was written in the contract. It was not, he was told, but the neighbours would certainly notice. "
    "He left the row as it was.",
    "Reading aloud to a child changes the reader as well as the listener. Sentences that look fine on the page turn "
    "out to be too long for one breath, and a joke that seemed weak becomes funny when it is expected. The same story "
    "may be asked for every night for a month. By the end of it both of you know where to pause, and neither would "
    "accept a different ending.",
)


def general_text(count: int | None = None) -> list[str]:
    """The passages, in order; the first ``count`` of them when given. Each is one paragraph of 60 to 80 words."""
    if count is not None and not 1 <= count <= len(GENERAL_TEXT):
        raise ValueError(f"count {count}: there are {len(GENERAL_TEXT)} passages")
    return list(GENERAL_TEXT[:count])
